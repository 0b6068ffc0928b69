import numpy as np
from PIL import Image


def hint_of(image, preprocessor, width, height):
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        image = Image.open(image)
    image = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    return (np.asarray(image).astype(np.float32) / 255).transpose(2, 0, 1).copy()
