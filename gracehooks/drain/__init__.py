"""Leaving without losing: the phases of a worker's end, one deadline each, and a report of what was lost."""
