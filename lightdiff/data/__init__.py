"""Images -> a list -> crops -> batches, and latents -> batches.

Read `files`, `images` and `loading`, in this order, then `latents`. What a folder of ordinary pictures does without
(archives, tables of labels, copies, colour profiles, ...) lies in `lightdiff/extras/data/`, one file an idea.
"""
