"""The paper at toy size: every variant trained and measured, and a page with the verdict on each claim."""
