"""Looks at pictures while they are written."""

from matplotlib.figure import Figure
from matplotlib.text import Text

__all__ = ["Drawn"]


class Drawn:
    """Every figure that is written to a file from now on, and all texts drawn in it with their boxes."""

    def __init__(self, monkeypatch):
        self.figures, self.names, self.texts = [], [], []
        draw, save = Text.draw, Figure.savefig
        boxes = {}

        def record(text, renderer, *args, **kwargs):
            if text.get_visible() and text.get_text().strip():
                boxes[text] = text.get_window_extent(renderer)
            draw(text, renderer, *args, **kwargs)

        def keep(figure, path, dpi):
            boxes.clear()
            save(figure, path, dpi=dpi)
            self.names.append(path.name.replace(".part", ""))
            self.figures.append(figure)
            size = figure.get_size_inches() * dpi
            self.texts.append(
                [(t.get_text(), b, size) for t, b in boxes.items() if t.figure.canvas is figure.canvas]
            )

        monkeypatch.setattr(Text, "draw", record)
        monkeypatch.setattr(Figure, "savefig", keep)

    def text_of(self, name):
        """All that is written in a picture."""
        return "\n".join(text for text, *_ in self.texts[self.names.index(name)])

    def check(self):
        """Axes are named, and all texts lie within the picture, beside each other, and are no TeX."""
        assert self.figures
        for name, figure, texts in zip(self.names, self.figures, self.texts, strict=True):
            assert any(axes.get_xlabel() or axes.get_ylabel() for axes in figure.axes), name
            assert len(texts) > 5
            for index, (text, box, (width, height)) in enumerate(texts):
                inside = (box.x0 > -1, box.y0 > -1, box.x1 < width + 1, box.y1 < height + 1)
                assert all(inside), (name, text)
                assert "$\\math" not in text, (name, text)
                for other, other_box, _ in texts[index + 1 :]:
                    shared = box.intersection(box, other_box)
                    assert shared is None or min(shared.width, shared.height) < 1.5, (name, text, other)
