"""Models that the measures of `evaluate.metrics` use, one small module an architecture.

Each is made of a local folder or file, a device, and the name that the report shows. Another one is a module beside
these, and its record in cdm.measures.
"""
