"""The trainer that every example shares."""
