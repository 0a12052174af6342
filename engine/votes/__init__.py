"""People's votes on images: what is asked (board), what was answered (store), and the page they answer on."""
