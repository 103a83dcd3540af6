#include "screen.h"

#include "devices.h"

/* Bochs display interface, which all three adapters answer (qemu docs/specs/standard-vga). */
#define DISPI_INDEX 0x1ce
#define DISPI_DATA 0x1cf
#define DISPI_XRES 1
#define DISPI_YRES 2
#define DISPI_BPP 3
#define DISPI_ENABLE 4
#define DISPI_ON_LINEAR 0x41

#define PCI_BAR0 0x10               /* the frame buffer, in all three adapters */

static const u32 adapters[] = {
    0x11111234,                     /* std */
    0x10501af4,                     /* virtio-vga, as long as no driver starts its virtio part */
    0x01001b36,                     /* qxl */
};

static volatile u32 *pixels;
static const u8 *glyphs;

static void dispi(u16 index, u16 value)
{
    outw(DISPI_INDEX, index);
    outw(DISPI_DATA, value);
}

int screen_start(const u8 *font)
{
    glyphs = font;
    for (u32 i = 0; i < sizeof adapters / sizeof adapters[0]; i++) {
        u32 device;
        if (!pci_find(adapters[i], &device))
            continue;
        pixels = (volatile u32 *)(pci_read(device, PCI_BAR0) & ~15u);
        dispi(DISPI_ENABLE, 0);
        dispi(DISPI_XRES, SCREEN_WIDTH);
        dispi(DISPI_YRES, SCREEN_HEIGHT);
        dispi(DISPI_BPP, 32);
        dispi(DISPI_ENABLE, DISPI_ON_LINEAR);
        return 1;
    }
    return 0;
}

static u32 mix(u32 from, u32 to, u32 part, u32 whole)
{
    u32 mixed = 0;
    for (u32 shift = 0; shift <= 16; shift += 8) {
        u32 a = from >> shift & 255, b = to >> shift & 255;
        mixed |= (a * (whole - part) + b * part) / whole << shift;
    }
    return mixed;
}

void fill(u32 x, u32 y, u32 width, u32 height, u32 colour)
{
    for (u32 row = y; row < y + height; row++)
        for (u32 column = x; column < x + width; column++)
            pixels[row * SCREEN_WIDTH + column] = colour;
}

void frame(u32 x, u32 y, u32 width, u32 height, u32 colour)
{
    fill(x, y, width, 1, colour);
    fill(x, y + height - 1, width, 1, colour);
    fill(x, y, 1, height, colour);
    fill(x + width - 1, y, 1, height, colour);
}

void gradient(u32 top, u32 bottom)
{
    for (u32 row = 0; row < SCREEN_HEIGHT; row++)
        fill(0, row, SCREEN_WIDTH, 1, mix(top, bottom, row, SCREEN_HEIGHT));
}

/* Darkens an area: drawn before a window, a little lower and to the right of it. */
void shadow(u32 x, u32 y, u32 width, u32 height)
{
    for (u32 row = y; row < y + height; row++)
        for (u32 column = x; column < x + width; column++) {
            volatile u32 *pixel = &pixels[row * SCREEN_WIDTH + column];
            *pixel = mix(*pixel, 0, 3, 8);
        }
}

void dot(u32 x, u32 y, u32 colour)
{
    for (int dy = -4; dy <= 4; dy++)
        for (int dx = -4; dx <= 4; dx++) {
            int column = (int)x + dx, row = (int)y + dy;
            if (dx * dx + dy * dy <= 18 && column >= 0 && row >= 0 && column < SCREEN_WIDTH && row < SCREEN_HEIGHT)
                pixels[row * SCREEN_WIDTH + column] = colour;
        }
}

void glyph(u32 x, u32 y, u8 character, u32 ink, u32 paper)
{
    const u8 *rows = glyphs + character * GLYPH_HEIGHT;
    for (u32 row = 0; row < GLYPH_HEIGHT; row++)
        for (u32 column = 0; column < GLYPH_WIDTH; column++)
            pixels[(y + row) * SCREEN_WIDTH + x + column] = rows[row] & (0x80 >> column) ? ink : paper;
}

u32 text(u32 x, u32 y, const char *string, u32 ink, u32 paper)
{
    for (; *string; string++, x += GLYPH_WIDTH)
        glyph(x, y, (u8)*string, ink, paper);
    return x;
}

u32 number(u32 x, u32 y, u32 value, u32 digits, u32 ink, u32 paper)
{
    for (u32 place = digits; place--; value /= 10)
        glyph(x + place * GLYPH_WIDTH, y, (u8)('0' + value % 10), ink, paper);
    return x + digits * GLYPH_WIDTH;
}

/* ---- Cursor --------------------------------------------------------------------------------------------------- */

#define CURSOR_WIDTH 12
#define CURSOR_HEIGHT 19

/* '#' is the dark outline, '.' the light inside. */
static const char arrow[CURSOR_HEIGHT][CURSOR_WIDTH + 1] = {
    "#           ",
    "##          ",
    "#.#         ",
    "#..#        ",
    "#...#       ",
    "#....#      ",
    "#.....#     ",
    "#......#    ",
    "#.......#   ",
    "#........#  ",
    "#.........# ",
    "#......#####",
    "#...#..#    ",
    "#..# #..#   ",
    "#.#  #..#   ",
    "##    #..#  ",
    "#     #..#  ",
    "       #..# ",
    "        ##  ",
};

static u32 covered[CURSOR_HEIGHT][CURSOR_WIDTH];
static u32 cursor_x, cursor_y;
static int cursor_visible;

/* Draws the part of the cursor that is on the screen and keeps what it covers, or puts that back. */
static void cursor_copy(int show)
{
    for (u32 row = 0; row < CURSOR_HEIGHT && cursor_y + row < SCREEN_HEIGHT; row++)
        for (u32 column = 0; column < CURSOR_WIDTH && cursor_x + column < SCREEN_WIDTH; column++) {
            volatile u32 *pixel = &pixels[(cursor_y + row) * SCREEN_WIDTH + cursor_x + column];
            char shape = arrow[row][column];
            if (shape == ' ')
                continue;
            if (show) {
                covered[row][column] = *pixel;
                *pixel = shape == '#' ? 0x101010 : 0xffffff;
            } else {
                *pixel = covered[row][column];
            }
        }
}

void cursor_hide(void)
{
    if (cursor_visible)
        cursor_copy(0);
    cursor_visible = 0;
}

void cursor_show(u32 x, u32 y)
{
    if (cursor_visible && cursor_x == x && cursor_y == y)
        return;
    cursor_hide();
    cursor_x = x;
    cursor_y = y;
    cursor_copy(1);
    cursor_visible = 1;
}
