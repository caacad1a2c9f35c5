"""The page itself, as Gradio's components: two columns of settings with what they draw, and one slider for both."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

from dit.config import from_dict
from dit.errors import UserError
from dit.experiments.loaded import TrainedModel
from dit.serving.drawing import draw
from dit.serving.setting import EVERY, NO_CLASS, Limits, Setting, class_choices, fitting

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before the import, which asks for it

import gradio as gr

DEVICE = "device"  # what all drawings share: one at a time, whoever asks
PRIVATE: dict[str, Any] = {"api_visibility": "private"}  # for the page's own script alone
KEPT = 3600  # seconds that a picture stays on the disk for its visitor
# Small images are magnified, pixel by pixel.
CSS = """
[id^=picture-] .image-frame { width: 100% }
[id^=picture-] img { width: 100%; max-height: 60vh; object-fit: contain; image-rendering: pixelated }
[id^=way-] .preview img { width: 100%; height: 100%; object-fit: contain; image-rendering: pixelated }
"""
FIELDS = tuple(f.name for f in fields(Setting))


def build(model: TrainedModel, limits: Limits) -> gr.Blocks:
    """The page. Its pictures lie in GRADIO_TEMP_DIR, and are removed after an hour."""
    names = ("A", "B")
    with gr.Blocks(
        title="dit", analytics_enabled=False, delete_cache=(KEPT // 6, KEPT), fill_width=True
    ) as page:
        gr.Markdown(f"## {_title(model)}\nTimes t: 0 is the image, 1 the noise. Scale 1 is no guidance.")
        with gr.Row():
            controls = [_Controls(model, limits, name) for name in names]
        with gr.Row(equal_height=True):
            compared = gr.Checkbox(label="compare with a second setting, B", elem_id="compare")
            button = gr.Button("Draw", variant="primary", elem_id="draw")
        with gr.Row():
            results = [_Results(name) for name in names]
        place = gr.Slider(
            *(0, 100, 100),
            step=1,
            label="way from noise (0) to image (100): x above, and below it what the model then takes the image for",
            visible=bool(limits.frames),
            elem_id="place",
        )
        with gr.Row(visible=bool(limits.frames)):
            ways = [_Way(name) for name in names]
        of_second = [controls[1].column, results[1].column, ways[1].column]
        compared.change(
            lambda on: [gr.update(visible=on)] * len(of_second), compared, of_second, queue=False, **PRIVATE
        )
        place.change(
            lambda at, *counts: [gr.update(selected_index=_index(at, count)) for count in counts],
            [place, *(way.count for way in ways)],
            [way.gallery for way in ways],
            queue=False,
            show_progress="hidden",
            **PRIVATE,
        )
        sides = list(zip(controls, results, ways, strict=True))
        _when_clicked(button, compared, place, sides, _drawer(model, limits))
    page.queue(max_size=limits.max_waiting, api_open=False)
    return page


def _when_clicked(
    button: Any, compared: Any, place: Any, sides: list[Any], drawer: Callable[..., Any]
) -> None:
    """Draw A, and B after it where that is asked for; each waits for its own turn in the queue."""

    def draw_a(at: float, _: bool, *given: Any, progress: Any = gr.Progress()) -> Any:  # noqa: B008
        return drawer(progress, at, True, given)

    def draw_b(at: float, is_compared: bool, *given: Any, progress: Any = gr.Progress()) -> Any:  # noqa: B008
        return drawer(progress, at, is_compared, given)

    event = button.click
    for function, (controls, results, way) in zip((draw_a, draw_b), sides, strict=True):
        outputs = [results.picture, way.gallery, results.about, way.count]
        inputs = [place, compared, *controls.inputs]
        event = event(function, inputs, outputs, concurrency_id=DEVICE, concurrency_limit=1, **PRIVATE).then


def _title(model: TrainedModel) -> str:
    """Which weights these are; nothing of where they lie."""
    count = len(model.classes)
    return f"{model.trained.weights} weights of step {model.step}, {model.image_size} pixels, {count} classes"


class _Controls:
    """The fields of one setting."""

    def __init__(self, model: TrainedModel, limits: Limits, name: str) -> None:
        own, has_classes = Setting(), bool(model.classes)
        solvers, grids = fitting(model.trained)
        start = EVERY if has_classes else NO_CLASS
        most = {"images": limits.max_images, "steps": limits.max_steps}
        made: dict[str, Any] = {}

        def number(field: str, label: str, **how: Any) -> None:
            value = getattr(own, field)
            how |= {"label": label, "elem_id": f"{field}-{name}", "min_width": 80}
            made[field] = gr.Number(min(value, most.get(field, value)), **how)

        def choice(field: str, label: str, choices: list[Any], value: str, **how: Any) -> None:
            how |= {"label": label, "elem_id": f"{field}-{name}", "min_width": 120}
            made[field] = gr.Dropdown(choices, value=value, **how)

        with gr.Column(visible=name == "A", elem_id=f"controls-{name}") as self.column:
            with gr.Row():
                names = class_choices(model.classes)
                choice("classes", "class", names, start, visible=has_classes, scale=2)
                choice("solver", "solver", solvers, _first(own.solver, solvers))
                choice("grid", "grid of times", grids, _first(own.grid, grids))
            with gr.Row():
                number("images", "images", precision=0)
                number("seed", "seed", precision=0)
                number("steps", "steps", precision=0)
                number("scale", "scale", visible=has_classes)
                number("interval_from", "from t", visible=has_classes)
                number("interval_to", "to t", visible=has_classes)
        self.inputs = [made[field] for field in FIELDS]


class _Results:
    """The images of one setting, and how to get them, or why there are none."""

    def __init__(self, name: str) -> None:
        with gr.Column(visible=name == "A") as self.column:
            self.picture = gr.Image(
                format="png",
                show_label=False,  # it would lie over them
                interactive=False,
                elem_id=f"picture-{name}",
                buttons=["download", "fullscreen"],
            )
            self.about = gr.Textbox(
                label=f"{name}: the same by command, or why not",
                interactive=False,
                lines=2,
                elem_id=f"about-{name}",
            )


class _Way:
    """Pictures from noise to the images of one setting."""

    def __init__(self, name: str) -> None:
        with gr.Column(visible=name == "A") as self.column:
            self.gallery = gr.Gallery(
                format="webp",
                label=f"way of {name}",
                interactive=False,
                preview=True,
                elem_id=f"way-{name}",
                object_fit="contain",
                height=360,
                buttons=["fullscreen"],
            )
            self.count = gr.State(0)


def _first(wanted: str, choices: list[str]) -> str:
    return wanted if wanted in choices else choices[0]


def _index(at: float, count: int) -> int | None:
    """Which of `count` pictures stands at `at` percent of the way."""
    return round(min(max(at, 0), 100) / 100 * (count - 1)) if count else None


def _drawer(model: TrainedModel, limits: Limits) -> Callable[..., Any]:
    """What a click calls: (progress, slider's place, is it wanted, the fields) -> picture, way, text, count."""

    def drawn(progress: Any, at: float, is_wanted: bool, given: Sequence[Any]) -> Any:
        if not is_wanted:
            return [gr.skip()] * 4
        try:
            setting = from_dict(Setting, dict(zip(FIELDS, given, strict=True)))
            made = draw(model, setting, limits, lambda share: progress(share, desc="drawing"))
        except UserError as error:
            lines = "; ".join(str(error).splitlines())
            return None, gr.update(value=None, selected_index=None), f"not drawn: {lines}", 0
        count = len(made.way)
        return made.grid, gr.update(value=made.way, selected_index=_index(at, count)), made.about, count

    return drawn
