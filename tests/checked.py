"""What holds arguments and results to their annotations in every test (`--jaxtyping-packages` in pyproject.toml)."""

from beartype import BeartypeConf, beartype

# As PEP 484 and mypy have it, an int will do where a float is asked for.
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
