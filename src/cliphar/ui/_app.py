"""The script that Streamlit runs for every visitor."""

from __future__ import annotations

from pathlib import Path

import streamlit as st

from cliphar.errors import ClipharError
from cliphar.ui._components import keep_focus
from cliphar.ui._live import live_page
from cliphar.ui._models import models_page
from cliphar.ui._photo import photo_page
from cliphar.ui._session import backend
from cliphar.ui._show import STYLE
from cliphar.ui._teach import teach_page
from cliphar.ui._video import video_page

__all__ = ["app"]


def app() -> None:
    """Draw the chosen page."""
    # before the navigation, which would fetch an icon from elsewhere
    st.set_page_config(page_title="cliphar", page_icon=str(Path(__file__).with_name("icon.svg")), layout="wide")
    st.html(STYLE)
    pages = [
        st.Page(photo_page, title="Photo", icon=":material/photo_camera:", url_path="photo", default=True),
        st.Page(video_page, title="Video", icon=":material/movie:", url_path="video"),
        st.Page(live_page, title="Live", icon=":material/videocam:", url_path="live"),
        st.Page(teach_page, title="Teach", icon=":material/school:", url_path="teach"),
        st.Page(models_page, title="Models", icon=":material/analytics:", url_path="models"),
    ]
    page = st.navigation(pages, position="hidden")
    st.set_page_config(page_title=f"{page.title} - cliphar")
    with st.container(horizontal=True, gap="small", key="pages"):  # Streamlit's own bar hides behind a button on phones
        for one in pages:
            st.page_link(one)
        keep_focus()
    try:
        with st.container():  # always there: what moves up is made anew, and forgets what was being typed into it
            if refused := st.session_state.pop("refused", None):
                st.error(f"{refused}.", icon=":material/error:")
        page.run()  # its title stands before the model is there
        st.caption(f"Answers by {backend().where}. Photos are kept for this session only.")
    except ClipharError as error:
        st.error(f"{error}.".replace("?.", "?"), icon=":material/error:")
        st.button("Try again")


if __name__ == "__main__":
    app()
