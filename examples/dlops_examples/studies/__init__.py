"""One module a study; study.py is what they share."""
