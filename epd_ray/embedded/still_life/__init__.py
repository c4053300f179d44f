"""Pictures that their captions leave mostly open: things in any place on grounds with light and patterns. Here are what
captions tell, how pictures are drawn and damaged, a judge that reads their pixels, and how the models are released."""
