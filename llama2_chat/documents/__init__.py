"""Documents of visitors: read in a process of their own, searched by their words, and quoted in questions.

library.py is the way in: a folder with one database per owner. Nothing here knows HTTP or who a visitor is; of a model
it knows ChatBackend.
"""
