/* The nested guest: finds the display that was passed through (behind a bridge, so not on bus 0), sets 320x200x32 by its
   Bochs registers (QEMU: docs/specs/standard-vga.rst) and paints a disc: yellow when the card's audio function came with it,
   red when not. */
#include "io.h"

static u32 config(u32 bus, u32 function, u32 at)
{
    outl(0xcf8, 0x80000000u | bus << 16 | function << 8 | at);
    return inl(0xcfc);
}

static void paint(u32 bus)
{
    u32 audio = config(bus, 1, 8) >> 16 == 0x0403;
    volatile u32 *picture = (volatile u32 *)(config(bus, 0, 0x10) & ~15u);
    volatile u8 *registers = (volatile u8 *)(config(bus, 0, 0x18) & ~15u);
    volatile u16 *mode = (volatile u16 *)(registers + 0x500);
    u32 command = config(bus, 0, 4);
    outl(0xcfc, command | 7);
    mode[4] = 0;
    mode[1] = 320;
    mode[2] = 200;
    mode[3] = 32;
    mode[4] = 0x41;
    for (int y = 0; y < 200; y++)
        for (int x = 0; x < 320; x++) {
            int inside = (x - 160) * (x - 160) + (y - 100) * (y - 100) < 3600;
            picture[y * 320 + x] = inside ? (audio ? 0xffcc00 : 0xff0000) : 0x1040a0;
        }
}

void main(void)
{
    for (u32 bus = 1; bus < 256; bus++)
        if (config(bus, 0, 0) == 0x11111234)
            paint(bus);
    for (;;)
        __asm__ volatile("hlt");
}
