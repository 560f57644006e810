"""The colours of all charts: told apart by the colour-blind, visible on white and on black."""

BLUE, ORANGE, GREY = "#3b7dd8", "#e08a1e", "#8a8f98"
