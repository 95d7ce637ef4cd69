"""What settings must know about data without importing numpy."""

__all__ = ["SHIPPED", "SIDE"]

SIDE = 32  # voxels along each edge of a sub-volume
SHIPPED = ("fifty", "coarse")  # label maps that are loaded by name
