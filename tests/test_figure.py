"""The figure of the clip is what its script draws from the losses."""

from tests.bench import clip_figure


def test_the_figure_is_up_to_date():
    assert clip_figure.FILE.read_text() == clip_figure.svg()
