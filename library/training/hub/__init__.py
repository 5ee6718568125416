"""Hugging Face Hub: a run's files are uploaded while it goes on, and a state can be fetched to go on from."""

from library.training.hub.fetching import fetch_state as fetch_state
from library.training.hub.options import HubOptions as HubOptions
from library.training.hub.uploader import Uploader as Uploader
from library.training.hub.uploader import uploader_of_run as uploader_of_run
