"""The Live page: the camera through WebRTC, its answers drawn on the picture."""

from __future__ import annotations

import streamlit as st

from cliphar.ui._camera import Camera
from cliphar.ui._components import plain
from cliphar.ui._intake import NO_CAMERA, gives_camera
from cliphar.ui._launch import ice_servers
from cliphar.ui._session import answerer, backend, choose_actions

__all__ = ["live_page"]

_HELP = """
- **Permission denied**: allow the camera for this page, by the sign beside its address, and press Start again.
- **Requested device not found**: plug a camera in.
- **Could not start video source**: another program has the camera; close that.
- **mediaDevices is undefined**: the page must be on https or localhost.
- **It takes long**: pictures go over UDP, which something between here and the page holds up. Be on the same network,
  or have who runs the page name a TURN server in `CLIPHAR_ICE_SERVERS`. The Photo page's camera needs no UDP.
"""


def live_page() -> None:
    """Draw the page."""
    st.title("What is happening now?", anchor=False)
    left, right = st.columns([2, 3], gap="large")
    with left, st.container(key="choices"):
        labels = choose_actions("live")
        st.caption("The picture goes from your browser to this page, and from there to the model only.")
        with st.expander("If the camera does not start", icon=":material/help:"):
            st.markdown(_HELP)
    with right:
        if not labels:
            st.info("The list of actions is empty. Type at least one.", icon=":material/edit:")
            return
        camera = _camera(labels)
        playing = _stream(camera)
        if playing:
            _speed(camera)
        elif not gives_camera():
            st.warning(NO_CAMERA, icon=":material/lock:")
        else:
            st.info("Press Start and allow the camera.", icon=":material/videocam:")


def _camera(labels: tuple[str, ...]) -> Camera:
    state = st.session_state
    asked = (answerer(), labels)
    if "camera" not in state:
        state.camera = Camera(backend().watch(labels))
    elif state.camera_asked != asked:
        state.camera.ask(backend().watch(labels))
    state.camera_asked = asked
    found: Camera = state.camera
    return found


def _stream(camera: Camera) -> bool:
    from streamlit_webrtc import WebRtcMode, webrtc_streamer

    context = webrtc_streamer(
        key="live",
        mode=WebRtcMode.SENDRECV,
        # none unless asked for: no stranger learns who looks at this page
        rtc_configuration={"iceServers": ice_servers()},
        media_stream_constraints={"video": {"width": {"ideal": 640}, "height": {"ideal": 480}}, "audio": False},
        video_frame_callback=camera.recv,
        on_video_ended=camera.ended,
        async_processing=True,
        video_html_attrs={"autoPlay": True, "controls": False, "muted": True, "style": {"width": "100%"}},
        translations={"start": "Start", "stop": "Stop", "select_device": "Choose a camera"},
    )
    return bool(context.state.playing)


@st.fragment(run_every=1.0)
def _speed(camera: Camera) -> None:
    if camera.trouble:
        st.error(f"{camera.trouble}.", icon=":material/error:")
        return
    speed = camera.speed()
    if speed is None:
        st.caption("Waiting for the first frames. If none come, the camera may be in use by another program.")
        return
    rate, latency = st.columns(2)
    rate.metric("Frames a second", f"{speed[0]:.0f}")
    latency.metric("From frame to answer", f"{speed[1]:.0f} ms")
    if camera.answer:  # for those who cannot see the picture, and for scripts that its font lacks
        st.write(f"Now: **{plain(camera.answer.label)}**")
