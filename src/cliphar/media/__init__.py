"""Decode photos, video and cameras, and bring them to the square that a bundle's image graph takes."""

from cliphar.media._camera import Camera, is_camera
from cliphar.media._folders import files_in, is_hidden
from cliphar.media._images import (
    IMAGE_SUFFIXES,
    MAX_PIXELS,
    ImageLike,
    decode_image,
    is_clip_name,
    is_image_name,
    is_media,
    several,
    to_square,
)
from cliphar.media._video import VIDEO_SUFFIXES, Frame, VideoInfo, VideoLike, VideoReader, is_video_name

__all__ = [
    "IMAGE_SUFFIXES",
    "MAX_PIXELS",
    "VIDEO_SUFFIXES",
    "Camera",
    "Frame",
    "ImageLike",
    "VideoInfo",
    "VideoLike",
    "VideoReader",
    "decode_image",
    "files_in",
    "is_camera",
    "is_clip_name",
    "is_hidden",
    "is_image_name",
    "is_media",
    "is_video_name",
    "several",
    "to_square",
]
