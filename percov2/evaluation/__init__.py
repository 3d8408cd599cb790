"""Evaluation: metrics, protocols, competitors, the run that joins them, and its report.

`percov2.evaluation.runner` writes the folder that the report is drawn from; docs/evaluation.md
describes both. Importing this package imports no torch.
"""
