/* The picture: 800x600, 32 bits a pixel (0xRRGGBB), on qemu's std, virtio or qxl VGA. */
#ifndef SCREEN_H
#define SCREEN_H

#include "io.h"

#define SCREEN_WIDTH 800
#define SCREEN_HEIGHT 600
#define GLYPH_WIDTH 8
#define GLYPH_HEIGHT 16

/* Sets the mode; `font` is the BIOS's 8x16 font. Answers 0 when there is no known adapter. */
int screen_start(const u8 *font);

void fill(u32 x, u32 y, u32 width, u32 height, u32 colour);
void frame(u32 x, u32 y, u32 width, u32 height, u32 colour);
void gradient(u32 top, u32 bottom);
void shadow(u32 x, u32 y, u32 width, u32 height);
void dot(u32 x, u32 y, u32 colour);
void glyph(u32 x, u32 y, u8 character, u32 ink, u32 paper);

/* Draw a text and answer the x behind it. */
u32 text(u32 x, u32 y, const char *string, u32 ink, u32 paper);
u32 number(u32 x, u32 y, u32 value, u32 digits, u32 ink, u32 paper);

/* The mouse cursor lies on top: hide it before anything is drawn, then show it where it is now. Both may be repeated. */
void cursor_hide(void);
void cursor_show(u32 x, u32 y);

#endif
