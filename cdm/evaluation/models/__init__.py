"""Models that the metrics of `evaluate.metrics` look at pictures with, one small module an architecture.

Each is made of a local folder or file, and is a `base.FeatureModel` or a `base.PictureScorer`: another one is a
module beside these and a line in cdm.evaluation.metrics.
"""
