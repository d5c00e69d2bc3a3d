"""What all parts of mfnet agree on."""

IGNORE_INDEX = 255  # the label of pixels that no loss and no score counts
