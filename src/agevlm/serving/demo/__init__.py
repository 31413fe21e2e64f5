"""The demo: a page where a model is asked about a picture and shows where it looked for every token."""
