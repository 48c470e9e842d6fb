"""deepatlas: an anatomical coordinate for every voxel, learned from unlabeled CT."""

__version__ = "0.1.0"
