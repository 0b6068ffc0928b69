"""DeepFloyd IF and models of its layout: diffusion on pixels, text through T5."""
