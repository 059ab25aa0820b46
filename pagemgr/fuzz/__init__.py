"""Random calls of a manager beside a naive model of what it promises."""
