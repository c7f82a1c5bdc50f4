"""The figures of ``plots.py`` as notebooks show them; imports matplotlib."""

from io import BytesIO

from matplotlib import figure

_PIXELS_PER_INCH = 75  # enough to read, and a saved notebook stays small


class Figure(figure.Figure):
    """A figure that notebooks show, although it is not one of pyplot's."""

    def _repr_png_(self) -> bytes:
        image = BytesIO()
        self.savefig(image, format="png", dpi=_PIXELS_PER_INCH)
        return image.getvalue()
