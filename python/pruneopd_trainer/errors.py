"""What a user can put right."""


class TrainerError(Exception):
    """Its text is one sentence: what is wrong, with which argument or file, and what was found there."""
