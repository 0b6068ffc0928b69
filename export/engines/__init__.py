"""TensorRT plans of a bundle's components. Needs neither torch nor diffusers: plans are built where they run."""
