"""A Space: move a slider, see the plan and the size, and ask the pruned model and the dense one about a picture."""

import os

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # it would phone home at start

import gradio as gr
import models
import page
from PIL import Image

START = 50  # per cent


def show_size(percent: int, row: int) -> tuple[str, str, str, str]:
    """Everything that depends on the slider; a score of another size goes."""
    found = models.pruned(percent)
    return page.sizes(found.plan, found.seconds), page.bars(found.plan), show_answers(percent, row), page.ASK_ALL


def show_answers(percent: int, row: int) -> str:
    """What both models say to one question."""
    return page.answers(models.answer(0, row), models.answer(percent, row), models.questions()[row]["answer"], percent)


def show_picture(picture: int, percent: int) -> tuple[int, Image.Image, gr.Radio, str]:
    """Show the next picture, its questions, and the answers to the first."""
    picture = (picture + 1) % (models.QUESTIONS // 4)
    rows = range(4 * picture, 4 * picture + 4)
    choices = [(models.questions()[row]["question"], row) for row in rows]
    image = models.questions()[rows[0]]["image"].resize((336, 336), Image.Resampling.BICUBIC)
    return picture, image, gr.Radio(choices, value=rows[0]), show_answers(percent, rows[0])


def show_scores(percent: int) -> str:
    """Let both models answer all questions."""
    return page.scores(models.right_answers(0), models.right_answers(percent), models.QUESTIONS)


def build() -> gr.Blocks:
    """Lay out the page; what it shows at first is computed here."""
    picture, image, first, said = show_picture(-1, START)
    size_html, bars_html, _, score_html = show_size(START, 0)
    with gr.Blocks(title="Learned pruning, as you watch", analytics_enabled=False) as app:
        gr.HTML(page.INTRO)
        number = gr.State(picture)
        with gr.Row(equal_height=False):
            with gr.Column(scale=6, min_width=320):
                slider = gr.Slider(0, 80, value=START, step=1, label="FFN neurons removed (%)", elem_id="ratio")
                size = gr.HTML(size_html)
                bars = gr.HTML(bars_html)
                score = gr.HTML(score_html)
                ask_all = gr.Button(f"Ask all {models.QUESTIONS} questions", variant="primary")
            with gr.Column(scale=5, min_width=320):
                shown = gr.Image(
                    image,
                    show_label=False,
                    interactive=False,
                    height=250,
                    buttons=[],
                    container=False,
                    elem_id="picture",
                )
                another = gr.Button("Another picture", size="sm", variant="secondary")
                question = gr.Radio(first.choices, value=first.value, label="Ask", elem_id="questions")
                answers = gr.HTML(said)
        quiet = {"show_progress": "hidden", "trigger_mode": "always_last"}
        slider.change(show_size, [slider, question], [size, bars, answers, score], **quiet)
        question.change(show_answers, [slider, question], answers, **quiet)
        another.click(show_picture, [number, slider], [number, shown, question, answers], **quiet)
        ask_all.click(show_scores, slider, score)
    return app


THEME = gr.themes.Base(
    primary_hue="sky",
    neutral_hue="slate",
    font=["system-ui", "sans-serif"],  # fonts of the device: nothing is fetched
    font_mono=["ui-monospace", "monospace"],
)

if __name__ == "__main__":
    build().launch(theme=THEME, css=page.CSS, footer_links=[])
