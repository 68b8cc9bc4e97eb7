"""Face detectors and embedders."""
