"""The scale ``micro``: a language model of film reviews that is trained here, its rewards and its prompts."""
