"""Files of an exported folder, as they are before `bundle` puts what they import from lightdiff into them."""
