"""The paper at toy size: every variant trained and measured, and a page of what holds."""
