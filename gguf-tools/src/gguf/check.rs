//! Checks of what a file says about its model.
