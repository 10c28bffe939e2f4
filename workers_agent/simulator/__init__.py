"""A simulated OpenAI-compatible engine: real HTTP, modelled time, answers that can be checked."""
