"""Decode photos and bring them to the square that a bundle's image graph takes."""

from cliphar.media._images import IMAGE_SUFFIXES, MAX_PIXELS, ImageLike, decode_image, is_image_name, to_square

__all__ = ["IMAGE_SUFFIXES", "MAX_PIXELS", "ImageLike", "decode_image", "is_image_name", "to_square"]
