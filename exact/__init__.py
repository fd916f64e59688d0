"""A world whose teacher is exact: a Gaussian mixture in the plane, distilled by the same engine as a large model."""
