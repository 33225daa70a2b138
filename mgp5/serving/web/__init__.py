"""The web page of `mgp5 serve --web`: a chat and a story beside the API, over the same serving loop."""
