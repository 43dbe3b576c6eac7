"""The web page: photos, video, camera, teaching and the models, for people who don't write code."""

from cliphar.ui._launch import launch, past_proxies, require_streamlit

__all__ = ["launch", "past_proxies", "require_streamlit"]
