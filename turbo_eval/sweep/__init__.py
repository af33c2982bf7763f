"""From TOML to cells, and the cells run."""
