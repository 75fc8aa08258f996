"""What only some data need: archives, Parquet, tables of labels, copies, colour profiles, 16 bits, changed images.

The core imports a module of this folder when the data turn out to need it: see `on_demand` in `lightdiff/data/`.
"""
