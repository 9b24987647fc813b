"""tips_jax: TIPS and TIPSv2 pretraining in JAX, and its neighbours as configs of one step."""
__version__ = '0.1.0'
