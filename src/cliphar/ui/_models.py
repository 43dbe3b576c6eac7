"""The Models page: which model answers, how good it is, how fast, and what it says of itself."""

from __future__ import annotations

import streamlit as st

from cliphar.bundle import list_models
from cliphar.evaluation import Analysis, Evaluation, confusion_svg, reliability_svg
from cliphar.ui._backend import About, Backend
from cliphar.ui._components import drawing, plain
from cliphar.ui._evaluate import evaluate_photos
from cliphar.ui._local import LocalBackend
from cliphar.ui._session import answerer, backend, refusing, use_model
from cliphar.ui._show import figures_html, mistakes_html, speeds_html
from cliphar.ui._speed import known_speeds, measure_round_trips, measure_speeds

__all__ = ["models_page"]


def models_page() -> None:
    """Draw the page."""
    st.title("Which model answers?", anchor=False)
    answering = backend()
    about = answering.about()
    own: Evaluation | None = st.session_state.setdefault("evaluations", {}).get(answerer())
    left, right = st.columns([2, 3], gap="large")
    with left:
        if isinstance(answering, LocalBackend):
            _choose(answering)
        else:
            st.info(
                f"{answering.where}, on the runtime {about.runtime}. Who starts the service chooses: "
                "cliphar serve --model NAME, or MODEL_PATH.",
                icon=":material/dns:",
            )
        st.header("How good is it on yours?", anchor=False)
        evaluate_photos(answering, about.name, own)
    with right:
        good, fast, card = st.tabs(["How good", "How fast", "Model card"])
        with good:
            _good(about, own)
        with fast:
            _fast(answering)
        with card, st.container(key="card"):
            st.markdown(about.card.removeprefix(f"# {about.name}").strip())


def _choose(answering: LocalBackend) -> None:
    state = st.session_state
    models = {str(model.path): model for model in list_models()}
    ready = {path: model.name for path, model in models.items() if model.state == "ready"}
    ready.setdefault(str(answering.model), answering.model.name)
    for key, value in (("model", str(answering.model)), ("runtime", answering.runtime)):
        if state.get(key) != value:
            state[key] = value
    st.selectbox("Model", list(ready), key="model", format_func=lambda path: ready[path], on_change=_switch)
    st.selectbox("Runtime", answering.runtimes, key="runtime", on_change=_switch_runtime)
    if len(answering.runtimes) == 1:
        st.caption(f"It has one runtime. 'cliphar export {answering.model.name} --to onnx-int8,openvino' adds others.")
    for model in models.values():
        if model.state == "to pull":
            st.caption(f"{model.name} is not complete here: 'cliphar model pull {model.name}' fetches it.")


def _switch() -> None:
    with refusing():
        use_model(st.session_state.model)


def _switch_runtime() -> None:
    answering = backend()
    with refusing():
        if isinstance(answering, LocalBackend):
            answering.use_runtime(st.session_state.runtime)
            st.session_state.lesson = None  # what was not kept is gone


def _good(about: About, own: Evaluation | None) -> None:
    if own is not None:
        st.header(f"Your photos, {plain(own.data)}", anchor=False)
        _analysis("own", own.analysis)
        if own.mistakes:
            st.subheader("The most confident mistakes", anchor=False)
            st.html(mistakes_html(own.mistakes))
    st.header("Measured when it was made", anchor=False)
    st.caption(
        "Right: the best answer is the true one. Macro F1 counts each action alike, however many photos it has. "
        "Calibration error: how far scores are from how often they are right. A set: the filled bars of an answer."
    )
    if about.evaluation is not None:
        _analysis("bundled", Analysis.from_dict(about.evaluation))
    for metrics in about.metrics.values():
        st.html(figures_html(metrics.description, metrics.n, metrics.values))
    if about.evaluation is None and own is None:
        st.info(
            "The confusion matrix and the reliability diagram did not come with this model. "
            "Measure it on photos of your own and they stand here.",
            icon=":material/query_stats:",
        )


def _analysis(key: str, analysis: Analysis) -> None:
    report = analysis.report
    st.html(figures_html("With 95 % intervals", report.n, report.to_dict(), analysis.ci95))
    worst = sorted((one for one in analysis.classes if one.n), key=lambda one: one.recall)[:3]
    st.caption(
        "A row is the true action, a column the answer, a number is photos. Hardest: "
        + ", ".join(f"{plain(one.label)} ({one.recall * 100:.0f} % found)" for one in worst)
        + "."
    )
    drawing(f"{key}_confusion", confusion_svg(analysis.labels, analysis.confusion), wide=True)
    st.caption(
        "How honest the scores are: on the dashed line a score of 0.8 is right eight times in ten. Bars below it are "
        "over-confident, pale bars hold few photos."
    )
    drawing(f"{key}_reliability", reliability_svg(analysis.reliability))


def _fast(answering: Backend) -> None:
    if not isinstance(answering, LocalBackend):
        _fast_service(answering)
        return
    st.caption("Each runtime in a process of its own, in turns. Answers here are slower meanwhile.")
    if st.button("Measure the speed on this machine", icon=":material/speed:"):
        measure_speeds(answering.model, answering.runtimes)
    found = known_speeds(answering.model)
    if found is not None:
        st.html(speeds_html(found["rows"]))
        for reason in found["skipped"].values():
            st.warning(f"{reason}.", icon=":material/info:")


def _fast_service(answering: Backend) -> None:
    state = st.session_state
    st.caption(
        "From this page to the service and back, while others use it too. What its runtimes do by themselves is "
        "measured on its machine: cliphar bench NAME."
    )
    if st.button("Measure the service", icon=":material/speed:"):
        with st.spinner("Asking about a sample photo, alone and 16 at once"):
            state.round_trips = measure_round_trips(answering)
    if found := state.get("round_trips"):
        one, many = st.columns(2)
        one.metric("From photo to answer", f"{found[0]:.0f} ms")
        many.metric("Photos a second, 16 at once", f"{found[1]:.0f}")
