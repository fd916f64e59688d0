"""The pipeline's stages: thin entry points, `python -m stages.NAME`, that dvc.yaml runs in order."""
