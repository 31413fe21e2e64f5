"""The five tasks, as lmms-eval reads them (package data)."""
