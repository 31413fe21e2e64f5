"""Cards of models and data sets, rendered from the files in their folders."""
