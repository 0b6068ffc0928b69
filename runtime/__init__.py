"""Online room: plans, samplers, the engine, backends, the command line. Imports neither torch nor diffusers."""
