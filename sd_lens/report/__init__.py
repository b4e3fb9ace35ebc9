"""One HTML page: findings in sentences, figures, the table of tokens, versions and settings."""
