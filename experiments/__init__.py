"""The evidence: one program for each question, run as `python -m experiments.NAME` (each has --help)."""
