"""byheart: give a language model knowledge that it does not have, and measure which way works."""

__version__ = "0.1.0"
