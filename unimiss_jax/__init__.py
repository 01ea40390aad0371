"""Universal pre-training for 2D and 3D medical images. Import the rooms, not this package."""
__version__ = '0.1.0'
